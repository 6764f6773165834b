"""The experiments behind ``tools/claims.py``: a frame that treats all arms alike, and one file per claim."""
