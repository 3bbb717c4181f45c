"""Several runs that answer one question: each in a folder and a process of its own, none of them ever run twice."""
