"""The chat server: requests are checked, queued, answered by one worker per device, and streamed back."""
