"""Rules that raise alerts, and where alerts are sent."""
