"""How networks are trained here: `_base` has what all runs share, and each network its file."""
