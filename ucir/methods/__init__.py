"""Methods: what is trained, by which losses."""

RECONSTRUCTED = ("darl", "dn2a")
"""Methods whose code and full text were not to be had: built from descriptions, which their numbers say."""
