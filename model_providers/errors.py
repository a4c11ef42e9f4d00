"""The mistake of a user in a model, a layout or a kernel choice."""


class ModelError(ValueError):
    """What is wrong (``key=value``), the limit and the way out, in one line that commands print as it is."""
