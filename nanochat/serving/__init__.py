"""The chat server: requests are checked, queued, answered by one worker a device, and streamed back."""
