"""How the bundled model and the demo data are made; see ``__main__``."""
