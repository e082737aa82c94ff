"""
The operator's page: `/admin` for a browser, and the pictures behind it.

`page.html` is the whole page; `routes.py` serves it and its data; `viewers.py` makes one picture a second for all who
watch. `cascadeinfer top` reads the same data.
"""
