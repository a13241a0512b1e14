"""The screens of the web page: each reads operations and fills a template."""
