"""Tables and boxes of HTML that objects show in a notebook."""
