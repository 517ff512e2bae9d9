# Generated from nbs/: edit the notebooks.
__version__ = "0.1.0"
