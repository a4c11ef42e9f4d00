"""One small module per kind of input, each with ``blocks(source, options)``; `corpora.READERS` lists them."""
