"""The mistake of a user in a corpus, a tokenizer or a data configuration."""


class DataError(ValueError):
    """What is wrong (``key=value``), the limit, and the way out, in one line; printed without a traceback."""


class OneRankError(DataError):
    """A `DataError` that only some ranks meet, raised on the one that must print it."""
