"""What combos offer about 2.2's two experts."""

WHOLE, HIGH, LOW, EVERY_LEVEL, AS_MADE = "not one of two", "high noise", "low noise", "low noise, at every level", "as the student was made"
SIDE_OF = {HIGH: "high", LOW: "low"}
