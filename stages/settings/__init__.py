"""The sections of params.yaml: every knob's type and range, and what must agree within a section."""
