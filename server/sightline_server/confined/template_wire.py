"""What a template's process answers with. Knows sizes alone."""

import struct

ANSWER = struct.Struct("<BQ")
"""Status, and the length of the JSON that follows, all of it ASCII."""
DONE, REFUSED = range(2)
MAX_SENTENCE = 1000
"""Characters of a refusal, a template's own words among them."""
