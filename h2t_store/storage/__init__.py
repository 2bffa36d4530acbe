"""Where features lie: the format, chunks, extractions, and the disks and object stores that hold them."""
