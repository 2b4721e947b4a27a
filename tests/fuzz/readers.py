"""All readers, by name."""

from . import checkpoints, own_data, records

READERS = {**own_data.READERS, **checkpoints.READERS, **records.READERS}
