"""The web page: drawing on a picture, and what is made of it. Needs the extra `app`."""
