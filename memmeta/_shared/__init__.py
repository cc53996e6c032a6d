"""What every room uses: argument checks, pytrees, and how objects are shown."""
