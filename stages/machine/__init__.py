"""How a stage runs on this machine: entry points, devices, several processes, signals. Changes no result."""
