"""What is wrong with data, said to its user; every other error is a fault of the package."""


class DataError(ValueError):
    """Something in a dataset that cannot be trained."""
