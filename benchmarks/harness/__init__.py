"""What every benchmark is built from: arguments, clocks, compiled programs, tables, pictures."""
