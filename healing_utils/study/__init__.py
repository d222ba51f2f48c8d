"""The study: parameters become cells, cells become records."""
