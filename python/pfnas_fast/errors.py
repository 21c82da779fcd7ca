# SPDX-License-Identifier: Apache-2.0
"""The one exception that means 'the caller asked for something that cannot be done'."""


class InputError(ValueError):
    """A user's mistake: a bad argument, file or configuration.

    The text is one line that names the argument, the value and what was expected, for example
    ``"load_space: expected a preset name or a YAML file for source, got 'tinny'"``. The command line prints
    it and exits with code 2; every other exception is a defect of this package.
    """
