"""The verbs of `dar`, one file each; nothing below imports them."""
