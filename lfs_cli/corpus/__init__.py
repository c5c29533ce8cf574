"""From text to shards to batches: where text comes from, how tokens lie on disk, and in which order they are read.

    sources.py    known datasets, the user's own text, manifests
    transfer.py   one file from a server, resumed and checked
    text.py       unpack, look for what is not text, cut between documents
    sample.py     the built-in stories
    shards.py     token shards on disk
    batches.py    which window of tokens each step reads

Import from the modules themselves; only `batches.py` needs torch.
"""
