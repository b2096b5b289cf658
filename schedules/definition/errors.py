"""What is wrong with a definition."""


class DefinitionError(ValueError):
    """A definition that isn't attention in a form that can be derived and scheduled.

    The message names the block or the expression, and the reason.
    """
