"""`aml data`: check, convert, stats."""

from aml.commands.data import check, convert, stats

ABOUT = "Check, convert and describe data sets: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, RRSIS-D."
COMMANDS = {"check": check, "convert": convert, "stats": stats}
