"""Rotation of the stream that a transformer's blocks add to: another basis, in which few channels hold nearly all.

``streams`` finds the streams that may be rotated, on the channel graph, and says why others may not; ``basis`` measures
them and chooses the directions; ``rotate`` carries it out, and proves that the network computes what it did.
"""
