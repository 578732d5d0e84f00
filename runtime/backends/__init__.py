"""One module per engine; each offers the same three names.

`path`, `group_size` (the fixed number of images, or None) and `run(images, sisms) -> maps`, plus `close()`.
"""
