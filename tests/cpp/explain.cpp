// Prints what styleforge::explain makes of the first argument.
#include <styleforge/load.h>

#include <iostream>

int main(int, char** argv) { std::cout << styleforge::explain(argv[1]) << "\n"; }
