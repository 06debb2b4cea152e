"""Every reach into the internals of NNCF, torch and transformers; no other room touches them."""
