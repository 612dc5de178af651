#!/bin/sh
# Builds the Debian package of what `make install DESTDIR=FOLDER/root PREFIX=/usr` has installed, for `make deb`.
#   rpc-server/packaging/deb.sh FOLDER      writes FOLDER/rabbitmq-rpc_<version>_<architecture>.deb
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"

package=rabbitmq-rpc
version=$(root/usr/bin/rpc-server --version | cut -d ' ' -f 2)
architecture=$(dpkg --print-architecture)
maintainer="${DEBFULLNAME:-the rpc-server and rpc-client maintainers} <${DEBEMAIL:-maintainers@localhost}>"

# What Debian wants otherwise than `make install` does it.
mv root/usr/share/zsh/site-functions root/usr/share/zsh/vendor-completions
gzip -9n root/usr/share/man/man1/*
install -D -m 644 "$here/../../LICENSE" "root/usr/share/doc/$package/copyright"
install -m 644 "$here/CHANGELOG.md" "root/usr/share/doc/$package"
date=${SOURCE_DATE_EPOCH:+@$SOURCE_DATE_EPOCH}
printf '%s (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md in this folder.\n\n -- %s  %s\n' \
    "$package" "$version" "$maintainer" "$(date -R -d "${date:-now}")" |
    gzip -9n >"root/usr/share/doc/$package/changelog.gz"

# dpkg-shlibdeps reads the source's control file.
mkdir -p debian root/DEBIAN
printf 'Source: %s\n\nPackage: %s\nArchitecture: any\n' "$package" "$package" >debian/control
depends=$(dpkg-shlibdeps -O root/usr/bin/* | sed -n 's/^shlibs:Depends=//p')
rm -r debian

cat >root/DEBIAN/control <<END
Package: $package
Version: $version
Architecture: $architecture
Maintainer: $maintainer
Installed-Size: $(du -sk --exclude=DEBIAN root | cut -f 1)
Depends: $depends
Recommends: ca-certificates
Suggests: rabbitmq-server
Section: net
Priority: optional
Description: run a program on another machine through RabbitMQ
 rpc-server takes requests from a queue in RabbitMQ, runs a program for each (or
 computes a Fibonacci number), and sends the answer back. rpc-client sends such
 requests, and waits for the answers. Both use the messages of the RabbitMQ RPC
 tutorial.
 .
 The unit rpc-server@QUEUE.service runs a server.
END
# A new unit is known at once. Servers that run are restarted by the operator: a stop waits for their programs.
cat >root/DEBIAN/postinst <<'END'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
END
cp root/DEBIAN/postinst root/DEBIAN/postrm
# The removal stops all servers, which waits for their programs, and disables them. An upgrade does not.
cat >root/DEBIAN/prerm <<'END'
#!/bin/sh
set -e
[ "$1" = remove ] || exit 0
if [ -d /run/systemd/system ]; then systemctl stop 'rpc-server@*.service'; fi
if command -v systemctl >/dev/null; then systemctl --quiet --no-reload disable rpc-server@.service; fi
END
chmod 755 root/DEBIAN/postinst root/DEBIAN/postrm root/DEBIAN/prerm
(cd root && find usr -type f -exec md5sum {} +) >root/DEBIAN/md5sums

dpkg-deb --root-owner-group --build root "${package}_${version}_$architecture.deb"
