"""The commands of `aml`, one module each, named as the command is.

A module has ABOUT (a sentence for the help), `add_arguments(parser)` and `run(options) -> exit code`; TAKES_SETTINGS
where section.name=value words may be given; MEMORY_REMEDY, what to do where the GPU's memory is not enough; or
COMMANDS, for a group of commands. Their imports of torch and its kin stand inside the functions: help shows at once.
"""
