"""What every room stands on: files in and out, and settings with their ranges."""
