"""The mistake of a user in a run file, a DeepSpeed JSON or a checkpoint."""


class RunError(ValueError):
    """What is wrong (``key=value``), the limit, and the way out, in one line; commands print it without a traceback."""
