/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Attach images, and list all loop devices there are. With code that gdbus-codegen makes of loopd's
 * interface, which an installed loopd has in /usr/share/dbus-1/interfaces:
 *
 *     gdbus-codegen --glib-min-required 2.64 --c-namespace Loop --c-generate-autocleanup all \
 *         --c-generate-object-manager --generate-c-code loop1 org.example.Loop1.xml
 *     cc -Wall devices.c loop1.c -o devices $(pkg-config --cflags --libs gio-unix-2.0)
 */

#include <errno.h>
#include <fcntl.h>

#include <gio/gio.h>
#include <gio/gunixfdlist.h>
#include <glib/gstdio.h>

#include "loop1.h"

#define LOOPD "org.example.Loop1"
#define MANAGER "/org/example/Loop1"

static gboolean attach(LoopManager *manager, const char *image, GError **error) {
        g_autoptr(GUnixFDList) fds = g_unix_fd_list_new();
        g_autofree char *device = NULL, *node = NULL;
        GVariantDict options;
        guint64 diskseq;
        int fd, index;

        fd = g_open(image, O_RDWR|O_CLOEXEC, 0);
        if (fd < 0) {
                int saved = errno;
                g_set_error(error, G_IO_ERROR, g_io_error_from_errno(saved), "%s: %s", image, g_strerror(saved));
                return FALSE;
        }
        /* The list has a copy, whose place in the list is what "h" says. */
        index = g_unix_fd_list_append(fds, fd, error);
        g_close(fd, NULL);
        if (index < 0)
                return FALSE;

        g_variant_dict_init(&options, NULL);
        g_variant_dict_insert(&options, "reference", "s", "devices.c");
        if (!loop_manager_call_attach_sync(manager,
                                         g_variant_new_handle(index),
                                         g_variant_dict_end(&options),
                                         G_DBUS_CALL_FLAGS_ALLOW_INTERACTIVE_AUTHORIZATION,
                                         G_MAXINT, /* as long as the user needs for a password */
                                         fds,
                                         &device, &node, &diskseq,
                                         NULL, NULL, error))
                return FALSE;
        g_print("%s is %s until this program ends\n", node, image);
        return TRUE;
}

static gboolean list(GError **error) {
        g_autoptr(GDBusObjectManager) manager = NULL;
        GList *objects;

        /* Kept up to date by loopd's signals, if there is a main loop that runs. */
        manager = loop_object_manager_client_new_for_bus_sync(G_BUS_TYPE_SYSTEM,
                                                              G_DBUS_OBJECT_MANAGER_CLIENT_FLAGS_NONE,
                                                              LOOPD, MANAGER, NULL, error);
        if (!manager)
                return FALSE;
        objects = g_dbus_object_manager_get_objects(manager);
        for (GList *each = objects; each; each = each->next) {
                LoopDevice *device = loop_object_peek_device(LOOP_OBJECT(each->data));

                if (device)
                        g_print("%s %" G_GUINT64_FORMAT " %s\n",
                                loop_device_get_node(device),
                                loop_device_get_size(device),
                                loop_device_get_backing_file(device));
        }
        g_list_free_full(objects, g_object_unref);
        return TRUE;
}

int main(int argc, char *argv[]) {
        g_autoptr(LoopManager) manager = NULL;
        g_autoptr(GError) error = NULL;
        gboolean done;

        manager = loop_manager_proxy_new_for_bus_sync(G_BUS_TYPE_SYSTEM, G_DBUS_PROXY_FLAGS_NONE,
                                                    LOOPD, MANAGER, NULL, &error);
        done = manager != NULL;
        for (int i = 1; done && i < argc; i++)
                done = attach(manager, argv[i], &error);
        if (done)
                done = list(&error);
        if (!done) {
                /* loopd's messages are sentences for people; g_dbus_error_get_remote_error() is the
                 * error's name, for programs. */
                g_dbus_error_strip_remote_error(error);
                g_printerr("devices: %s\n", error->message);
        }
        return done ? 0 : 1;
}
