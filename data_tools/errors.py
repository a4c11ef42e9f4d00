"""The mistake of a user in a corpus, a tokenizer or a data configuration."""


class DataError(ValueError):
    """What is wrong (``key=value``), the limit, and the way out, in one line; printed without a traceback."""
