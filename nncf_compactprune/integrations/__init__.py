"""Where models and data come from: resolvers for names such as ``timm:fbnetv3_b`` and ``digits``."""
