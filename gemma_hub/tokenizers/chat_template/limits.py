"""What a chat template may spend."""

MAX_LENGTH = 1 << 20
"""Characters of a template. Those of well-known models have 300 to 20,000."""
MAX_TOKENS = 10_000
"""Of Jinja in a template, its text not counted. Compiling one may take 0.1 ms and 10 kB."""
MAX_SECONDS = 3.0
MAX_STEPS = 1_000_000
MAX_UNITS = 1 << 24
"""Units that a rendering may use up: 64 MiB. See `Budget`."""
UNITS_PER_INPUT = 64
"""More units for each that the variables hold: a template may copy a conversation this often."""
MAX_DEPTH = 50
"""Of lists in lists, and of macros that call macros."""
MAX_BITS = 1024
"""Of a whole number."""
MAX_NEEDLE = 64
"""Characters to strip or to look back for: it takes time as their number times the text's."""

PLACE = 16
"""Units of a place in a list, and of a text beyond its characters."""
CALL = 256
"""Units of a macro that is called, and of a namespace."""
