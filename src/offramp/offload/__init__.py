"""A network over several machines: codec, links, the edge part and the part behind it."""
