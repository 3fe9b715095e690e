"""Aligned text tables."""


def align(rows: list[list[str]]) -> str:
  """Cells in columns, a line under the headings; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])
