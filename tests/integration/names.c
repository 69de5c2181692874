/* A name service for one process: names that end in .svc.cluster.local are looked up in the file $NAMES, whose lines
 * are "NAME ADDRESS", anew each time, as a cluster's pods come and go. Preloaded before the C library's own. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int lookup(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static const char suffix[] = ".svc.cluster.local";
    lookup *next = (lookup *)dlsym(RTLD_NEXT, "getaddrinfo");
    size_t length = node ? strlen(node) : 0;
    if (length < sizeof suffix || strcmp(node + length - (sizeof suffix - 1), suffix) != 0)
        return next(node, service, hints, found);
    FILE *names = fopen(getenv("NAMES"), "r");
    char name[256], address[64];
    int error = EAI_NONAME;
    while (names && error == EAI_NONAME && fscanf(names, "%255s %63s", name, address) == 2)
        if (strcmp(name, node) == 0)
            error = next(address, service, hints, found);
    if (names)
        fclose(names);
    return error;
}
