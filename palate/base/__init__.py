"""What every room stands on: errors, files, options, seeds, the machine, the hub. Knows no other room."""
