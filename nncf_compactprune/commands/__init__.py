"""Commands of the command line, a subject a file; :mod:`nncf_compactprune.cli` holds the rest and the entry point."""
