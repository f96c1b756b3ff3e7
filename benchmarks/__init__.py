"""What observing costs, measured side by side. ``make bench`` runs everything; each module runs alone too."""
