"""A shop: a FastAPI application whose money and stock change in transactions.

    python -m examples.shop

Routes call services, services use documents, and none of them knows of a session:

* ``models`` - the documents
* ``services`` - catalogue, customers, carts and order history
* ``checkout`` - the one thing that must not go wrong: stock, payment and order, or nothing
* ``schemas``, ``routes``, ``problems`` - what goes over HTTP
* ``app`` - the application, with the middleware that opens a scope for each request
"""
