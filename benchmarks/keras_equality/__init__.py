"""The policies beside the callback objects of Keras itself: one random case through both, and a record of each."""
