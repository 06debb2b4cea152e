"""The plugin door: what a plugin may offer, and the registry of everything installed."""

from nncf_compactprune.plugins.registry import Plugins, default_plugins

__all__ = ["Plugins", "default_plugins"]
