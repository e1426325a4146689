/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Attach an image, say where, and keep it until standard input ends. With sd-bus:
 *
 *     cc -Wall attach.c -o attach $(pkg-config --cflags --libs libsystemd)
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <systemd/sd-bus.h>

#define LOOPD "org.example.Loop1"

static void close_fd(int *fd) {
        if (*fd >= 0)
                close(*fd);
}

#define _close_ __attribute__((cleanup(close_fd)))
#define _bus_ __attribute__((cleanup(sd_bus_flush_close_unrefp)))
#define _message_ __attribute__((cleanup(sd_bus_message_unrefp)))
#define _error_ __attribute__((cleanup(sd_bus_error_free)))

/* The bus's or loopd's own words, if there are any: they are for people. */
static int fail(const char *what, const sd_bus_error *error, int r) {
        if (error && error->message)
                fprintf(stderr, "%s: %s (%s)\n", what, error->message, error->name);
        else
                fprintf(stderr, "%s: %s\n", what, strerror(-r));
        return r;
}

/* Returns a new message for a call during which polkit may ask the user for a password. */
static int new_call(sd_bus *bus, const char *path, const char *interface, const char *method, sd_bus_message **ret) {
        _message_ sd_bus_message *call = NULL;
        int r;

        r = sd_bus_message_new_method_call(bus, &call, LOOPD, path, interface, method);
        if (r < 0)
                return r;
        r = sd_bus_message_set_allow_interactive_authorization(call, true);
        if (r < 0)
                return r;
        *ret = call;
        call = NULL;
        return 0;
}

static int attach(sd_bus *bus, const char *image, char **ret_path, char **ret_node) {
        _message_ sd_bus_message *call = NULL, *reply = NULL;
        _error_ sd_bus_error error = SD_BUS_ERROR_NULL;
        _close_ int fd = -1;
        const char *path, *node;
        uint64_t diskseq;
        int r;

        /* With our own rights: loopd opens no path for anybody. */
        fd = open(image, O_RDWR|O_CLOEXEC|O_NOCTTY);
        if (fd < 0 && (errno == EACCES || errno == EROFS))
                fd = open(image, O_RDONLY|O_CLOEXEC|O_NOCTTY);
        if (fd < 0)
                return fail(image, NULL, -errno);

        r = new_call(bus, "/org/example/Loop1", LOOPD, "Attach", &call);
        if (r < 0)
                return fail("Attach", NULL, r);
        /* "h" takes a copy of the fd. Each option is a name and a value of the type it has. */
        r = sd_bus_message_append(call, "ha{sv}", fd, 1, "partition-scan", "b", true);
        if (r < 0)
                return fail("Attach", NULL, r);
        r = sd_bus_call(bus, call, UINT64_MAX, &error, &reply);
        if (r < 0)
                return fail("Attach", &error, r);
        r = sd_bus_message_read(reply, "ost", &path, &node, &diskseq);
        if (r < 0)
                return fail("Attach", NULL, r);

        /* These belong to the reply, which goes when we return. */
        *ret_path = strdup(path);
        *ret_node = strdup(node);
        if (!*ret_path || !*ret_node)
                return fail("Attach", NULL, -ENOMEM);
        return 0;
}

static int show(sd_bus *bus, const char *path, const char *node) {
        _error_ sd_bus_error error = SD_BUS_ERROR_NULL;
        _message_ sd_bus_message *reply = NULL;
        uint64_t size, start, length;
        const char *partition;
        uint32_t number;
        int r;

        r = sd_bus_get_property_trivial(bus, LOOPD, path, LOOPD ".Device", "Size", &error, 't', &size);
        if (r < 0)
                return fail("Size", &error, r);
        printf("%s %" PRIu64 "\n", node, size);

        r = sd_bus_get_property(bus, LOOPD, path, LOOPD ".Device", "Partitions", &error, &reply, "a(ustt)");
        if (r < 0)
                return fail("Partitions", &error, r);
        r = sd_bus_message_enter_container(reply, 'a', "(ustt)");
        if (r < 0)
                return fail("Partitions", NULL, r);
        while ((r = sd_bus_message_read(reply, "(ustt)", &number, &partition, &start, &length)) > 0)
                printf("%s %" PRIu64 "\n", partition, length);
        if (r < 0)
                return fail("Partitions", NULL, r);
        fflush(stdout);
        return 0;
}

static int detach(sd_bus *bus, const char *path) {
        _message_ sd_bus_message *call = NULL, *reply = NULL;
        _error_ sd_bus_error error = SD_BUS_ERROR_NULL;
        int r, gone;

        r = new_call(bus, path, LOOPD ".Device", "Detach", &call);
        if (r < 0)
                return fail("Detach", NULL, r);
        r = sd_bus_message_append(call, "a{sv}", 0);
        if (r < 0)
                return fail("Detach", NULL, r);
        r = sd_bus_call(bus, call, 0, &error, &reply);
        if (r < 0)
                return fail("Detach", &error, r);
        r = sd_bus_message_read(reply, "b", &gone);
        if (r < 0)
                return fail("Detach", NULL, r);
        if (!gone)
                printf("in use: it goes at the last close\n");
        return 0;
}

int main(int argc, char *argv[]) {
        _bus_ sd_bus *bus = NULL;
        char *path = NULL, *node = NULL, byte;
        int r;

        if (argc != 2) {
                fprintf(stderr, "usage: attach IMAGE\n");
                return 2;
        }
        r = sd_bus_open_system(&bus);
        if (r < 0)
                return fail("system bus", NULL, r), EXIT_FAILURE;

        r = attach(bus, argv[1], &path, &node);
        if (r >= 0)
                r = show(bus, path, node);
        if (r >= 0) {
                /* Were we killed here, the device would go all the same, with our connection. */
                while (read(STDIN_FILENO, &byte, 1) > 0)
                        ;
                r = detach(bus, path);
        }
        free(path);
        free(node);
        return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
