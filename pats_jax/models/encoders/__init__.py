"""The encoders, one file per family; `table` lists them."""
