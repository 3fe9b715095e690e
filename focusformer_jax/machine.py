"""What this process may use of the machine that it runs on."""

import os


def cores() -> int:
  """Processor cores, which schedulers and containers may limit to a part."""
  if hasattr(os, 'sched_getaffinity'):  # Linux
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
